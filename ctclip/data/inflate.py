"""Inflating and deflating gzip and zlib streams: by isal, about twice as fast as zlib and with the same checksums, or
by zlib."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the types of both, which isal declares differently
    from gzip import GzipFile
    from zlib import compress, decompress, decompressobj
    from zlib import error as InflateError
else:
    try:
        from isal.igzip import IGzipFile as GzipFile
        from isal.isal_zlib import IsalError as InflateError
        from isal.isal_zlib import compress, decompress, decompressobj
    except ImportError:
        from gzip import GzipFile
        from zlib import compress, decompress, decompressobj
        from zlib import error as InflateError  # noqa: N812

__all__ = ["GzipFile", "InflateError", "compress", "decompress", "decompressobj"]
