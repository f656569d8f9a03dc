"""The base of all cost tables."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from .sizes import checked_size

CONVENTION = {
    "unit": "GFLOPs: 1e9 multiply-adds; an element costs 5 in layer and group norm, 2 in batch norm, 4 when resized",
    "paper": "total and its parts: the core of deformable attention and masked query-key products count nothing",
    "full": "total_full and pixel_decoder_full: the same with the core, 4 per channel and sampling point",
}


class CostTable:
    """GFLOPs of a model for images of any size, in several settings: its exits, or shares of tokens that go on."""

    key: str  # name of the settings in a report
    column: str  # their heading in a table
    convention: Mapping[str, str]  # what is counted

    def details(self, padded_size: Sequence[int], output_size: Sequence[int] | None = None) -> dict:
        """{setting: {part: GFLOPs}} of an image; output_size: of its results, by default the padded size."""
        raise NotImplementedError

    def mean(self, images: Iterable[tuple[Sequence[int], Sequence[int]]]) -> dict:
        """The mean of `details` over images, given as (padded size, output size). Each distinct pair is computed once.

        Raises:
            ValueError: there is no image, or a size is not valid.
        """
        counts = Counter((checked_size(padded), checked_size(output)) for padded, output in images)
        if not counts:
            raise ValueError("there are no images to take the mean of")
        sums = defaultdict(Counter)
        for (padded, output), count in counts.items():
            for setting, gflops in self.details(padded, output).items():
                sums[setting].update({name: count * value for name, value in gflops.items()})
        return {k: {name: value / counts.total() for name, value in total.items()} for k, total in sums.items()}
