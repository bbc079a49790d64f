"""Exports a CLIP model of transformers: vision.onnx (pixel_values to image_embeds) and text.onnx (input_ids, attention_mask to text_embeds).

    python clip_transformers.py out openai/clip-vit-base-patch32
    python clip_transformers.py out --tiny
"""

import argparse

import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

import common


def vision(model, pixel_values):
    return model.visual_projection(model.vision_model(pixel_values=pixel_values).pooler_output)


def text(model, input_ids, attention_mask):
    return model.text_projection(model.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


def tiny():
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=24)
    return CLIPConfig(
        projection_dim=24,
        vision_config=dict(image_size=32, patch_size=8, **size),
        text_config=dict(vocab_size=64, max_position_embeddings=12, bos_token_id=62, eos_token_id=63, pad_token_id=63, **size),
    )


def main():
    parser = common.arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("model", nargs="?", help="a name on the hub, or a folder")
    args = parser.parse_args()
    if args.tiny == bool(args.model):
        parser.error("give a model, or --tiny")
    if args.tiny:
        model = common.randomize(CLIPModel(tiny()))
        common.save_preprocessing(args.out, image_processor_type="CLIPImageProcessor", size={"shortest_edge": 32}, crop_size=32)
    else:
        model = CLIPModel.from_pretrained(args.model, dtype=torch.float32).eval()
        AutoImageProcessor.from_pretrained(args.model).save_pretrained(args.out)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    size, context = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
    common.export(
        model, vision, args.out / "vision.onnx", {"pixel_values": common.images(size)}, ["image_embeds"],
        {"pixel_values": {0: "images"}, "image_embeds": {0: "images"}},
    )
    end = model.config.text_config.eos_token_id
    ids = torch.full((3, context), end)
    for row, length in enumerate((3, context - 2, context // 2)):
        ids[row, 1 : length] = torch.arange(1, length) % 40 + 1
    names = ["input_ids", "attention_mask", "text_embeds"]
    common.export(
        model, text, args.out / "text.onnx", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ["text_embeds"],
        {name: {0: "texts"} for name in names},
    )
    if not args.no_weights:
        common.save_weights(model, args.out)


if __name__ == "__main__":
    main()
