"""Which images are wide, before any of them is decoded: by the sizes of their records, else by the files' headers."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .images import header_size

logger = logging.getLogger(__name__)
READERS = 16  # threads; on a network drive a header is mostly waiting


def are_wide(records: Sequence[dict]) -> list[bool]:
    """Of each image whether it is wider than high, from its record, else from the header of its file.

    A file that cannot be read counts as high: who decodes it says what is wrong.
    """
    unknown = [r["file_name"] for r in records if "width" not in r]
    with ThreadPoolExecutor(READERS) as pool:
        headers = dict(zip(unknown, pool.map(header_size, unknown)))
    if unknown:
        logger.info("Read the sizes of %d images from their headers, to group them by aspect ratio", len(unknown))
    sizes = [(r["height"], r["width"]) if "width" in r else headers[r["file_name"]] for r in records]
    return [width > height for height, width in sizes]
