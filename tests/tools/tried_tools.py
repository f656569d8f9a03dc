"""Runs tools on bad input and checks how they end."""

from tiny import Tiny, call

CHANNELS = 128  # of res5 in the tiny model


class Tools:
    """Runs a tool in this process and checks how it ends."""

    def __init__(self, good: Tiny, output, capfd):
        self.good, self.output, self.capfd = good, output, capfd
        self.weights = ["MODEL.WEIGHTS", good.base / "model.pth"]

    def train(self, *more, data: Tiny | None = None, kind: str = "eco_maskformer2", flags=()) -> int:
        config = (data or self.good).config(kind)
        return call("train_net", "--config-file", config, *flags, *self._common(), "SOLVER.MAX_ITER", 2, *more)

    def evaluate(self, *more, data: Tiny | None = None) -> int:
        return self.train(*self.weights, *more, data=data, flags=["--eval-only"])

    def derive(self, *more, data: Tiny | None = None, split: str = "val", flags=()) -> int:
        data = data or self.good
        options = ["--dataset", f"{data.name}_{split}", "--output", self.output / "derived", "--workers", 0, *flags]
        return call("derive_dataset", "--config-file", data.config(), *options, *self._common(), *self.weights, *more)

    def fit(self, *arguments) -> int:
        return call("train_gate", *arguments)

    def _common(self) -> list:
        return ["OUTPUT_DIR", self.output]

    def message(self, status: int) -> str:
        """The message of a run, which must have ended with one."""
        out, err = self.capfd.readouterr()
        assert status == 1
        assert "Traceback" not in out + err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        return err[err.index("error: ") :]


def assert_names(message: str, *parts) -> None:
    for part in parts:
        assert str(part) in message, message
