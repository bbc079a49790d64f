"""Writes sam2.json: what SAM 2 answers for points and boxes, computed by PyTorch (transformers) and by a client of samexporter's graphs.

    python -m venv v && v/bin/pip install torch==2.15.0 transformers==5.24.0 onnxruntime==1.32.0 safetensors==0.8.0 pillow==13.0.0 numpy==2.4.6 pycocotools==2.0.11
    v/bin/python make_sam2.py FIXTURES

FIXTURES is the folder of small exports with random weights that the tests find below MERGANSER_TEST_DATA. The image is not square, so that prompts
and masks have to be scaled apart in the two directions.
"""
import io, json, sys
from pathlib import Path

import numpy, onnxruntime, PIL, torch, transformers
from PIL import Image
from pycocotools import mask as coco
from safetensors.torch import load_file
from transformers import Sam2Config, Sam2Model

HERE, FIXTURES = Path(__file__).parent, Path(sys.argv[1])
HEIGHT, WIDTH, SIZE = 96, 160, 128
MEAN, STD = numpy.array([0.485, 0.456, 0.406], numpy.float32), numpy.array([0.229, 0.224, 0.225], numpy.float32)
PROMPTS = [("1", [50.0, 40.0], [20.0, 10.0, 60.0, 50.0]), ("2", [120.5, 70.0], [90.0, 40.0, 65.0, 50.0])]  # name, point, x y width height


def picture():
    y, x = numpy.mgrid[0:HEIGHT, 0:WIDTH]
    image = numpy.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x + y) % 256], 2)
    image[(y - 40) ** 2 + (x - 50) ** 2 < 600] = (230, 40, 60)
    image[50:85, 95:150] = (20, 200, 220)
    return Image.fromarray(image.astype(numpy.uint8))


def pixels(image):
    resized = numpy.asarray(image.resize((SIZE, SIZE), Image.BILINEAR), numpy.float32) / 255
    return torch.from_numpy(((resized - MEAN) / STD).transpose(2, 0, 1).copy())[None]


def hf():
    backbone = dict(
        model_type="sam2_hiera_det_model", hidden_size=8, num_attention_heads=1, image_size=[SIZE, SIZE], window_positional_embedding_background_size=[3, 3],
        blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 2, 4, 8], window_size_per_stage=[8, 4, 6, 3],
        global_attention_blocks=[3], mlp_ratio=2.0,
    )
    return Sam2Model(Sam2Config(
        vision_config=dict(backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]], fpn_hidden_size=32),
        prompt_encoder_config=dict(hidden_size=32, image_size=SIZE, patch_size=16, mask_input_channels=8),
        mask_decoder_config=dict(hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32),
    )).eval()


def scaled(points):
    return [[x / WIDTH * SIZE, y / HEIGHT * SIZE] for x, y in points]


def chosen(masks, scores):
    best = int(numpy.argmax(scores))
    whole = torch.nn.functional.interpolate(torch.from_numpy(masks[None, best : best + 1]), (HEIGHT, WIDTH), mode="bilinear", align_corners=False)
    encoded = coco.encode(numpy.asfortranarray((whole[0, 0] > 0).numpy().astype(numpy.uint8)))
    return {"predicted_iou": float(scores[best]), "mask": {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}}


def by_transformers(model, image):
    for name, point, (x, y, w, h) in PROMPTS:
        for kind, given in [
            ("point", dict(input_points=torch.tensor([[scaled([point])]]), input_labels=torch.ones(1, 1, 1, dtype=torch.int64))),
            ("box", dict(input_boxes=torch.tensor([[sum(scaled([[x, y], [x + w, y + h]]), [])]]))),
        ]:
            with torch.no_grad():
                output = model(pixel_values=pixels(image), multimask_output=True, **given)
            yield {"object": name, "prompt": kind, **chosen(output.pred_masks[0, 0].numpy(), output.iou_scores[0, 0].numpy())}


def by_client(image):
    encoder, decoder = (onnxruntime.InferenceSession(str(FIXTURES / f"sam2_meta/{half}.ts17.onnx")) for half in ("encoder", "decoder"))
    embeddings = dict(zip(["high_res_feats_0", "high_res_feats_1", "image_embed"], encoder.run(None, {"image": pixels(image).numpy()})))
    for name, point, (x, y, w, h) in PROMPTS:
        for kind, points, labels in [("point", [point], [1]), ("box", [[x, y], [x + w, y + h]], [2, 3])]:
            masks, scores = decoder.run(["masks", "iou_predictions"], embeddings | {
                "point_coords": numpy.array([scaled(points)], numpy.float32), "point_labels": numpy.array([labels], numpy.float32),
                "mask_input": numpy.zeros((1, 1, SIZE // 4, SIZE // 4), numpy.float32), "has_mask_input": numpy.zeros(1, numpy.float32),
            })
            yield {"object": name, "prompt": kind, **chosen(masks[0], scores[0])}


if __name__ == "__main__":
    image = picture()
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    model, answers = hf(), {}
    for weights in ("base", "perturbed"):
        model.load_state_dict(load_file(str(FIXTURES / f"sam2_hf/{weights}.safetensors")))
        answers[f"sam2_hf {weights}"] = list(by_transformers(model, image))
    answers["sam2_meta base"] = list(by_client(image))
    y, x = numpy.mgrid[0:HEIGHT, 0:WIDTH]
    truths = [(y - 40) ** 2 + (x - 50) ** 2 < 600, (y >= 50) & (y < 85) & (x >= 95) & (x < 150)]
    record = {"image": {"height": HEIGHT, "width": WIDTH}, "annotations": [
        {"id": int(name), "bbox": box, "point_coords": [point],
         "segmentation": {"size": [HEIGHT, WIDTH], "counts": coco.encode(numpy.asfortranarray(truth.astype(numpy.uint8)))["counts"].decode()}}
        for (name, point, box), truth in zip(PROMPTS, truths)
    ]}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "onnxruntime": onnxruntime.__version__, "pillow": PIL.__version__}
    (HERE / "sam2.json").write_text(json.dumps({"versions": versions, "image": file.getvalue().hex(), "record": record, "answers": answers}, indent=1) + "\n")
    for key, list_ in answers.items():
        print(key, [(a["prompt"], round(a["predicted_iou"], 4), round(float(coco.area({"size": a["mask"]["size"], "counts": a["mask"]["counts"].encode()})) / HEIGHT / WIDTH, 3)) for a in list_])
