"""Exports a SAM 2 model of transformers: an image encoder, and a prompt encoder with mask decoder.

    python sam2_transformers.py out facebook/sam2.1-hiera-tiny
    python sam2_transformers.py out facebook/sam2.1-hiera-tiny --layout segment-anything --masks 4
    python sam2_transformers.py out --tiny

Layouts:

transformers       vision_encoder.onnx (pixel_values to image_embeddings.0, .1, .2) and prompt_encoder_mask_decoder.onnx (input_points,
                   input_labels, input_boxes, image_embeddings.* to iou_scores, pred_masks, object_score_logits), as transformers.js has them
segment-anything   encoder.onnx (image to high_res_feats_0, high_res_feats_1, image_embed) and decoder.onnx (image_embed, high_res_feats_*,
                   point_coords, point_labels, mask_input, has_mask_input to masks, iou_predictions), as samexporter has them

Three masks answer an unclear prompt, such as a point. With --masks 4 the one for clear prompts, such as a box, comes first.
"""

import argparse

import torch
from transformers import AutoImageProcessor, Sam2Config, Sam2Model

import common

EMBEDDINGS = {
    "transformers": ["image_embeddings.0", "image_embeddings.1", "image_embeddings.2"],
    "segment-anything": ["high_res_feats_0", "high_res_feats_1", "image_embed"],
}


def encode(model, pixel_values):
    return tuple(model.get_image_embeddings(pixel_values))


def decode_like_transformers(model, points, labels, boxes, fine, middle, coarse):
    output = Sam2Model.forward(
        model, input_points=points, input_labels=labels, input_boxes=boxes, image_embeddings=[fine, middle, coarse], multimask_output=True
    )
    return output.iou_scores, output.pred_masks, output.object_score_logits


def decode_like_segment_anything(masks):
    def decode(model, coarse, fine, middle, coords, labels, mask, has_mask):
        prompts, decoder = model.prompt_encoder, model.mask_decoder
        n = coords.shape[0]
        # A last point that is none; pixels are meant by their centres.
        coords = torch.cat([coords + 0.5, torch.zeros_like(coords[:, :1])], 1)
        labels = torch.cat([labels, -torch.ones_like(labels[:, :1])], 1).unsqueeze(-1)
        size = (prompts.input_image_size, prompts.input_image_size)
        sparse = prompts.shared_embedding(coords.unsqueeze(1), size).squeeze(1)
        sparse = sparse * (labels != -1) + prompts.not_a_point_embed.weight * (labels == -1)
        for kind in range(4):
            sparse = sparse + prompts.point_embed.weight[kind] * (labels == kind)
        none = prompts.no_mask_embed.weight.reshape(1, -1, 1, 1)
        dense = has_mask * prompts.mask_embed(mask) + (1 - has_mask) * none
        given = dict(
            image_embeddings=coarse,
            image_positional_embeddings=model.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse.unsqueeze(1),
            dense_prompt_embeddings=dense.expand(n, -1, -1, -1),
            high_resolution_features=[fine, middle],
        )
        found, scores = decoder(multimask_output=True, **given)[:2]
        if masks == 4:
            single, score = decoder(multimask_output=False, **given)[:2]
            found, scores = torch.cat([single, found], 2), torch.cat([score, scores], 2)
        return torch.clamp(found.squeeze(1), -32.0, 32.0), scores.squeeze(1)

    return decode


def tiny():
    return Sam2Config(
        vision_config=dict(
            backbone_config=dict(
                model_type="sam2_hiera_det_model", hidden_size=8, num_attention_heads=1, image_size=[128, 128],
                window_positional_embedding_background_size=[3, 3], blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 32, 64],
                num_attention_heads_per_stage=[1, 2, 4, 8], window_size_per_stage=[8, 4, 6, 3], global_attention_blocks=[3], mlp_ratio=2.0,
            ),
            backbone_channel_list=[64, 32, 16, 8], backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]], fpn_hidden_size=32,
        ),
        prompt_encoder_config=dict(hidden_size=32, image_size=128, patch_size=16, mask_input_channels=8),
        mask_decoder_config=dict(hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32),
    )


def load(name):
    model = Sam2Model.from_pretrained(name, dtype=torch.float32).eval()
    AutoImageProcessor.from_pretrained(name)
    return model


def main():
    parser = common.arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("model", nargs="?", help="a name on the hub, or a folder")
    parser.add_argument("--layout", choices=list(EMBEDDINGS), default="transformers")
    parser.add_argument("--masks", type=int, choices=[3, 4], default=3, help="of segment-anything (default: 3)")
    args = parser.parse_args()
    if args.tiny == bool(args.model):
        parser.error("give a model, or --tiny")
    if args.masks == 4 and args.layout == "transformers":
        parser.error("--masks 4 goes with --layout segment-anything")
    if args.tiny:
        model = common.randomize(Sam2Model(tiny()))
        shared = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.data.copy_(shared.data)  # one tensor in released checkpoints
    else:
        model = Sam2Model.from_pretrained(args.model, dtype=torch.float32).eval()
    size = model.config.prompt_encoder_config.image_size
    common.save_preprocessing(
        args.out, image_processor_type="Sam2ImageProcessor", do_convert_rgb=True, do_resize=True, size={"height": size, "width": size}, resample=2,
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )
    names = EMBEDDINGS[args.layout]
    pixels = common.images(size, n=1)
    with torch.no_grad():
        fine, middle, coarse = encode(model, pixels)
    middle_of = lambda *points: torch.tensor(points) * size / 128
    if args.layout == "transformers":
        common.export(
            model, encode, args.out / "vision_encoder.onnx", {"pixel_values": pixels}, names, {name: {0: "images"} for name in ["pixel_values", *names]}
        )
        inputs = {
            "input_points": middle_of([[[30.0, 40.0], [100.0, 90.0], [64.0, 20.0]], [[5.0, 120.0], [60.0, 60.0], [0.0, 0.0]]]),
            "input_labels": torch.tensor([[[1, 0, 1], [1, 1, -1]]]),
            "input_boxes": middle_of([[10.0, 20.0, 90.0, 100.0], [40.0, 5.0, 120.0, 60.0]]),
        }
        free = {"input_points": {1: "objects", 2: "points"}, "input_labels": {1: "objects", 2: "points"}, "input_boxes": {1: "boxes"}}
        common.export(
            model, decode_like_transformers, args.out / "prompt_encoder_mask_decoder.onnx", inputs | dict(zip(names, (fine, middle, coarse))),
            ["iou_scores", "pred_masks", "object_score_logits"], free,
        )
    else:
        common.export(model, encode, args.out / "encoder.onnx", {"image": pixels}, names, {})
        inputs = {
            "image_embed": coarse,
            "high_res_feats_0": fine,
            "high_res_feats_1": middle,
            "point_coords": middle_of([[30.0, 40.0], [100.0, 90.0]]),
            "point_labels": torch.tensor([[1.0, 0.0]]),
            "mask_input": torch.randn(1, 1, size // 4, size // 4, generator=torch.Generator().manual_seed(2)),
            "has_mask_input": torch.tensor([1.0]),
        }
        free = {"point_coords": {1: "points"}, "point_labels": {1: "points"}}
        common.export(
            model, decode_like_segment_anything(args.masks), args.out / "decoder.onnx", inputs, ["masks", "iou_predictions"], free
        )
    if not args.no_weights:
        common.save_weights(model, args.out)


if __name__ == "__main__":
    main()
