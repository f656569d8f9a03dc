"""tools/export_weights.py: its file loads like the checkpoint."""

import export_weights
import pytest
import torch

from eco_m2f.checkpoint.safe_load import CheckpointError, read_checkpoint, weights_sha256


def test_the_weights_alone_are_written(tmp_path, capsys):
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3).T, "a.count": torch.tensor(3)}
    torch.save({"model": weights, "optimizer": {"lr": 1.0}, "matching_heuristics": True}, tmp_path / "m.pth")
    export_weights.main(
        export_weights.build_parser().parse_args([str(tmp_path / "m.pth"), str(tmp_path / "m.safetensors")])
    )
    found = read_checkpoint(tmp_path / "m.safetensors")
    assert found.keys() == {"model", "matching_heuristics"}
    assert weights_sha256(found["model"]) == weights_sha256(weights)
    assert capsys.readouterr().out == f"{tmp_path}/m.safetensors: 2 tensors, 7 numbers\n"


def test_the_classes_come_along(tmp_path):
    classes = [{"id": 7, "name": "Gebäude", "isthing": 1, "color": [1, 2, 3]}]
    torch.save({"model": {"a": torch.ones(2)}, "classes": classes}, tmp_path / "m.pth")
    export_weights.export(tmp_path / "m.pth", tmp_path / "m.safetensors")
    assert read_checkpoint(tmp_path / "m.safetensors")["classes"] == classes


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must end in .safetensors"):
        export_weights.export(tmp_path / "m.pth", tmp_path / "n.pth")
