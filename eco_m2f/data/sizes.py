"""Finds out which images are wide without decoding them: from their records, or else from the files' headers."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .images import header_size

logger = logging.getLogger(__name__)
READERS = 16  # threads; on a network drive, reading a header is mostly waiting


def are_wide(records: Sequence[dict]) -> list[bool]:
    """Whether each image is wider than high. The size is the record's, or else the file's header's.

    A file that cannot be read counts as high. Decoding it later reports the error.
    """
    unknown = [r["file_name"] for r in records if "width" not in r]
    with ThreadPoolExecutor(READERS) as pool:
        headers = dict(zip(unknown, pool.map(header_size, unknown)))
    if unknown:
        logger.info("Read the sizes of %d images from their headers, to group them by aspect ratio", len(unknown))
    sizes = [(r["height"], r["width"]) if "width" in r else headers[r["file_name"]] for r in records]
    return [width > height for height, width in sizes]
