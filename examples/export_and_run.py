"""Export and run: a compressed network as ONNX, run by ONNX Runtime with any batch size, without torch or pliant.

python examples/export_and_run.py --epochs 20 --out exported
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import pliant

# The program of the device, which needs only numpy and onnxruntime.
PROGRAM = """
import sys, time
import numpy as np, onnxruntime
folder = sys.argv[1]
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
test = np.load(f"{folder}/test.npz")
name = session.get_inputs()[0].name
for batch in (1, 7, len(test["images"])):
    started = time.perf_counter()
    (scores,) = session.run(None, {name: test["images"][:batch]})
    right = (scores.argmax(1) == test["labels"][:batch]).mean()
    print(f"batch of {batch:>3}: accuracy {right:.1%}, {1e3 * (time.perf_counter() - started):.1f} ms")
assert not {"torch", "pliant"} & set(sys.modules)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("exported"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # images of 8×8 are too small for several threads
    torch.manual_seed(0)
    data = pliant.load_data("digits")
    model = pliant.build_model("resnet8", num_classes=data.num_classes, image_shape=data.image_shape)
    loader = pliant.Loader(data, "train", batch_size=128, shuffle=True)
    rules = [("fc.*", None), ("*.weight", pliant.rank(k=0.05, radius=3))]
    optimizer = pliant.SFW(pliant.constrain(model, rules, default=None), lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=arguments.epochs)
    for epoch in range(arguments.epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        schedule.step()

    images, labels = next(iter(pliant.Loader(data, "test", len(data.test))))
    calibration = pliant.Loader(data, "train", batch_size=256)
    small = pliant.compress_to(model.eval(), pliant.LowRank(), images[:1], keep_macs=0.4, calibration=calibration)
    folder = pliant.export(small, arguments.out, images[:1], formats=("safetensors", "onnx"), overwrite=True)
    for path in sorted(folder.iterdir()):
        print(f"{path.name:<20}{path.stat().st_size:>9,} bytes")
    np.savez(folder / "test.npz", images=images.contiguous().numpy(), labels=labels.numpy())
    subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], check=True)


if __name__ == "__main__":
    main()
