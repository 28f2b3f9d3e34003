"""What every test runs under."""

from __future__ import annotations

from bitsandbytes.nn import modules


def pytest_configure() -> None:
    """Have bitsandbytes compute from weights as they lie in the file, on every processor.

    With AVX512-BF16, its 4-bit layers repack their weights in place at the first forward pass, for a kernel of another
    package: scales are cut to bfloat16, and widths that are no multiple of 64 fail.
    """
    vars(modules)["has_avx512bf16"] = lambda: False
