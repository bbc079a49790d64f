"""Exports a CLIP model of open_clip: vision.onnx (pixel_values to image_embeds) and text.onnx (input_ids to text_embeds).

    python clip_open.py out ViT-B-32 laion2b_s34b_b79k
    python clip_open.py out --tiny
"""

import argparse

import open_clip
import torch

import common


def tiny():
    return open_clip.model.CLIP(
        embed_dim=24,
        quick_gelu=True,
        vision_cfg=dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8, mlp_ratio=2.0),
        text_cfg=dict(context_length=12, vocab_size=64, width=32, heads=2, layers=2, mlp_ratio=2.0),
    )


def main():
    parser = common.arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("model", nargs="?", help="an architecture, such as ViT-B-32")
    parser.add_argument("pretrained", nargs="?", help="a tag of open_clip, or a checkpoint file")
    args = parser.parse_args()
    if args.tiny == bool(args.model and args.pretrained):
        parser.error("give a model and its weights, or --tiny")
    if args.tiny:
        model = common.randomize(tiny())
        size, config = 32, dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), interpolation="bicubic")
    else:
        model = open_clip.create_model(args.model, pretrained=args.pretrained, precision="fp32").eval()
        config = dict(model.visual.preprocess_cfg)
        size = config["size"] if isinstance(config["size"], int) else config["size"][0]
        if config.get("resize_mode", "shortest") != "shortest":
            parser.error(f"images of this model are resized by `{config['resize_mode']}`, which preprocessor_config.json cannot say")
    common.save_preprocessing(args.out, **common.shortest_edge_and_crop(size, 1.0, config["interpolation"], config["mean"], config["std"]))
    common.export(
        model, lambda model, pixels: model.encode_image(pixels), args.out / "vision.onnx", {"pixel_values": common.images(size)}, ["image_embeds"],
        {"pixel_values": {0: "images"}, "image_embeds": {0: "images"}},
    )
    context, end = model.context_length, model.vocab_size - 1
    ids = torch.zeros((3, context), dtype=torch.int64)
    for row, length in enumerate((4, context - 2, context // 2)):
        ids[row, 0], ids[row, 1 : length - 1], ids[row, length - 1] = end - 1, torch.arange(1, length - 1) % 40 + 1, end
    common.export(
        model, lambda model, ids: model.encode_text(ids), args.out / "text.onnx", {"input_ids": ids}, ["text_embeds"],
        {"input_ids": {0: "texts"}, "text_embeds": {0: "texts"}},
    )
    if not args.no_weights:
        common.save_weights(model, args.out)


if __name__ == "__main__":
    main()
