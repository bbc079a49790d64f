"""Exports a classifier of timm (DeiT, ViT and others): model.onnx (pixel_values to logits).

    python deit_timm.py out deit_tiny_patch16_224
    python deit_timm.py out deit_tiny_patch16_224 --checkpoint finetuned.pth --classes 100
    python deit_timm.py out --tiny

The logits of distilled models are the mean of both heads, as in timm.
"""

import argparse

import timm

import common


def main():
    parser = common.arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("model", nargs="?", help="a name of timm")
    parser.add_argument("--checkpoint", default="", help="weights of this file rather than timm's")
    parser.add_argument("--classes", type=int, help="the number of classes, if it is not that of the pretrained model")
    args = parser.parse_args()
    if args.tiny == bool(args.model):
        parser.error("give a model, or --tiny")
    if args.tiny:
        tiny = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
        model = common.randomize(timm.create_model("deit_tiny_distilled_patch16_224", **tiny))
    else:
        classes = {} if args.classes is None else {"num_classes": args.classes}
        model = timm.create_model(args.model, pretrained=not args.checkpoint, checkpoint_path=args.checkpoint, **classes).eval()
    # Fused attention has no ONNX form that keeps the weights as they are.
    timm.layers.set_fused_attn(False)
    config = timm.data.resolve_model_data_config(model)
    size = 32 if args.tiny else config["input_size"][-1]
    if config.get("crop_mode", "center") != "center":
        parser.error(f"images of this model are cropped by `{config['crop_mode']}`, which preprocessor_config.json cannot say")
    common.save_preprocessing(
        args.out, **common.shortest_edge_and_crop(size, config["crop_pct"], config["interpolation"], config["mean"], config["std"])
    )
    common.export(
        model, lambda model, pixels: model.forward_head(model.forward_features(pixels)), args.out / "model.onnx",
        {"pixel_values": common.images(size)}, ["logits"], {"pixel_values": {0: "images"}, "logits": {0: "images"}},
    )
    if not args.no_weights:
        common.save_weights(model, args.out)


if __name__ == "__main__":
    main()
