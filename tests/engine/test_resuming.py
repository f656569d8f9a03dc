"""Settings that changed between a run and the run that continues it."""

import argparse
import logging

import pytest
import yaml
from tiny import Tiny, kept_log_handlers

from eco_m2f.engine.resuming import changed_settings, settings_before
from eco_m2f.engine.setup import setup


def test_changes_are_told_by_key_with_both_values():
    before = {"SOLVER": {"BASE_LR": 0.1, "STEPS": [1, 2]}, "SEED": 1, "OUTPUT_DIR": "a", "MODEL": {"OLD": {"KEY": 3}}}
    now = {"SOLVER": {"BASE_LR": 0.2, "STEPS": [1, 2]}, "SEED": 1, "OUTPUT_DIR": "b", "MODEL": {"NEW": None}}
    assert changed_settings(before, now) == [
        ("MODEL.NEW", "absent", None),
        ("MODEL.OLD.KEY", 3, "absent"),
        ("SOLVER.BASE_LR", 0.1, 0.2),
    ]
    assert changed_settings(now, now) == []


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    return Tiny(tmp_path_factory.mktemp("tiny"), num_train=1, num_val=1).config()


def set_up(config: str, output, *opts, resume: bool) -> None:
    opts = [*("OUTPUT_DIR", str(output), "SEED", 1), *opts]
    arguments = argparse.Namespace(config_file=config, opts=opts, resume=resume, eval_only=False)
    with kept_log_handlers():
        setup(arguments)


@pytest.fixture
def warnings(caplog):
    """The warnings about settings. A handler is needed, because setup stops the package's logger from propagating."""
    logger = logging.getLogger("eco_m2f.engine.resuming")
    logger.addHandler(caplog.handler)
    yield lambda: [m for m in dict.fromkeys(caplog.messages) if "another setting" in m]
    logger.removeHandler(caplog.handler)


def test_resuming_with_another_rate_warns(config, tmp_path, warnings, caplog):
    change = ("SOLVER.BASE_LR", 0.5, "DATALOADER.NUM_WORKERS", 3)
    set_up(config, tmp_path, resume=False)
    set_up(config, tmp_path, *change, resume=True)
    assert warnings() == []  # no checkpoint is there: nothing to go on from
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    set_up(config, tmp_path, resume=False)
    set_up(config, tmp_path, *change, resume=True)
    (line,) = warnings()
    assert "SOLVER.BASE_LR was" in line and "is now 0.5" in line
    caplog.clear()
    set_up(config, tmp_path, *change, resume=True)
    assert warnings() == []


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"!!python/object/apply:os.getcwd []", b"text"])
def test_a_config_that_cannot_be_read_stops_nothing_and_runs_nothing(tmp_path, content):
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    (tmp_path / "config.yaml").write_bytes(content)
    assert settings_before(str(tmp_path), 1) is None


def old_run(config: str, output, *, steps: int, batch: int) -> None:
    """A run of an earlier version that accumulated `steps` batches."""
    set_up(config, output, resume=False)
    (output / "last_checkpoint").write_text("model_0000001.pth")
    settings = yaml.safe_load((output / "config.yaml").read_text())
    settings["SOLVER"] |= {"IMS_PER_BATCH": batch, "ACCUMULATION_STEPS": steps}
    settings["MODEL"]["ECO"]["ALPHA_LIST"] = []
    (output / "config.yaml").write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize("steps, batch", [(1, 4), (4, 1), (2, 2)])
def test_an_earlier_run_goes_on_with_the_same_number_of_images(config, tmp_path, warnings, steps, batch):
    old_run(config, tmp_path, steps=steps, batch=batch)
    set_up(config, tmp_path, "SOLVER.IMS_PER_BATCH", 4, resume=True)
    assert warnings() == []


def test_an_earlier_run_with_another_number_of_images_is_refused_every_time(config, tmp_path):
    old_run(config, tmp_path, steps=8, batch=2)
    for _ in range(2):  # the folder keeps its config
        with pytest.raises(ValueError, match="ACCUMULATION_STEPS 8 and IMS_PER_BATCH 2.* SOLVER.IMS_PER_BATCH 16"):
            set_up(config, tmp_path, "SOLVER.IMS_PER_BATCH", 2, resume=True)
