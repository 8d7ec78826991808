"""The main job: quantize a FLUX.1 model, run it in a real ComfyUI server, tell what came out.

Run by ``python scripts/host.py demo [--scheme CASE]``. The model is small and its weights are
random, so the picture shows a texture and nothing else; everything around it is real: the sdnq
package writes the checkpoint, ComfyUI's server runs the queued workflow from text to saved image.
Four runs of the same seed are compared:

| run         | weights                                         | loaded by                |
|-------------|-------------------------------------------------|--------------------------|
| original    | bf16, before quantization                       | ComfyUI's UNETLoader     |
| dequantized | float32, as the sdnq package itself dequantizes | ComfyUI's UNETLoader     |
| auto, int8  | the quantized checkpoint                        | LowBitLoadDiffusionModel |
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from support import comfy_root, oracle
from workbench import Done, Server, flux_prompt, link_pack, node

WIDTH = "384"
SIZE, STEPS, SEED = 256, 4, 7


def say(text: str) -> None:
    print(f"[lowbit] {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="host.py demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--scheme",
        default="uint4_svd",
        help="a case of tests/oracles/sdnq_models.py: uint4, int8, fp8, uint4_had_svd, dyn4 ... "
        "(default: %(default)s)",
    )
    scheme = parser.parse_args().scheme
    started = time.monotonic()
    say(f"making a FLUX.1 model, {WIDTH} wide, and quantizing it with the sdnq package: {scheme}")
    try:
        made = oracle("workbench_models.py", WIDTH, scheme)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    base = Path(os.environ.get("LOWBIT_BASE") or made.parent / "demo")
    lay_out(made, base, scheme)
    say(f"starting ComfyUI's server in {base}")
    arguments = [] if torch.accelerator.is_available() else ["--cpu"]
    with Server(comfy_root(), base, arguments) as server:
        runs, kernels = run_all(server, scheme)
    image = runs["auto"].files("save")[0]
    print_table(runs, made, scheme)
    for matmul, lines in kernels.items():
        print(f"kernels, matmul {matmul}:")
        print("\n".join(f"  {line.strip()}" for line in lines))
    print()
    for name, done in runs.items():
        print(f"image, {name + ':':<13} {done.files('save')[0]}")
    say(f"done in {time.monotonic() - started:.0f} s: {image}")
    return 0


def lay_out(made: Path, base: Path, scheme: str) -> None:
    """Fill the server's model folders, from nothing."""
    models = base / "models"
    shutil.rmtree(models, ignore_errors=True)
    for source, target in (
        ("text_encoders", "text_encoders"),
        ("vae_approx", "vae_approx"),
        (scheme, f"diffusion_models/{scheme}"),
        (f"{scheme}.original.safetensors", "diffusion_models/original.safetensors"),
        (f"{scheme}.dequantized.safetensors", "diffusion_models/dequantized.safetensors"),
    ):
        (models / target).parent.mkdir(parents=True, exist_ok=True)
        if (made / source).is_dir():
            shutil.copytree(made / source, models / target)
        else:
            shutil.copy(made / source, models / target)
    link_pack(base)


def run_all(server: Server, scheme: str) -> tuple[dict[str, Done], dict[str, list[str]]]:
    """Every run, and what the Inspect node says of the kernels."""
    # The text first, and out of the way: its cost is no model's.
    prompt = flux_prompt({}, prefix="")
    text = {name: prompt[name] for name in ("clip", "text")}
    server.run(text | {"show": node("PreviewAny", source=["text", 0])})
    loaders = {
        "original": stock("original"),
        "dequantized": stock("dequantized"),
        "auto": node("LowBitLoadDiffusionModel", model=scheme, scheme="auto", matmul="auto"),
        "int8": node("LowBitLoadDiffusionModel", model=scheme, scheme="auto", matmul="int8"),
    }
    runs, kernels = {}, {}
    for name, loader in loaders.items():
        prompt = flux_prompt(loader, prefix=f"{scheme}-{name}", size=SIZE, steps=STEPS, seed=SEED)
        if loader["class_type"] != "UNETLoader":
            prompt["inspect"] = node("LowBitInspect", model=scheme, matmul=name)
        say(f"queued: {loader['class_type']} ({name}) -> KSampler, {STEPS} steps -> save")
        runs[name] = server.run(prompt)
        if "inspect" in prompt:
            report = runs[name].text("inspect").splitlines()
            kernels[name] = [line for line in report if line.strip().split(" ")[1:2] == ["layers:"]]
    return runs, kernels


def stock(name: str) -> dict:
    return node("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="default")


def print_table(runs: dict[str, Done], made: Path, scheme: str) -> None:
    whole = (made / f"{scheme}.original.safetensors").stat().st_size
    small = sum(file.stat().st_size for file in (made / scheme).glob("*.safetensors"))
    rows = {
        "original": ("bf16, stock loader", whole),
        "dequantized": (f"{scheme} in float32, stock loader", 2 * whole),
        "auto": (f"{scheme}, LowBit, matmul auto", small),
        "int8": (f"{scheme}, LowBit, matmul int8", small),
    }
    print()
    head = ("model", "size", "of bf16", "from bf16", "PSNR", "from dequantized", "seconds")
    print("{:<34} {:>9} {:>8} {:>10} {:>8} {:>17} {:>8}".format(*head))
    for name, (label, size) in rows.items():
        done = runs[name]
        print(
            f"{label:<34} {size / 2**20:>5.1f} MiB {size / whole:>8.0%} "
            f"{away(done, runs['original']):>10} {psnr(done, runs['original']):>8} "
            f"{away(done, runs['dequantized']):>17} {done.seconds:>8.1f}"
        )
    print("from ...: difference of the final latent, relative; PSNR: of the image from bf16's\n")


def away(done: Done, reference: Done) -> str:
    if done is reference:
        return "-"
    got, want = (
        load_file(run.files("latent")[0])["latent_tensor"].double() for run in (done, reference)
    )
    error = float((got - want).norm() / want.norm())
    return f"{error:.1e}" if error else "equal"


def psnr(done: Done, reference: Done) -> str:
    if done is reference:
        return "-"
    got, want = (
        np.asarray(Image.open(run.files("save")[0])).astype(np.float64) for run in (done, reference)
    )
    error = float(((got - want) ** 2).mean())
    return "equal" if error == 0 else f"{10 * np.log10(255**2 / error):.1f} dB"


if __name__ == "__main__":
    sys.exit(main())
