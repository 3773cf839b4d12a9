"""Hints that name the optional dependencies of a part of the package."""


def missing(what: str, extra: str) -> str:
    """Say which extra `what` needs and how to install it from a checkout.

    The package has no published release to install by name, so the hint never names one.

    Args:
        what: subject of the sentence, in the plural, such as `"Parquet and Arrow files"`.
        extra: key of `[project.optional-dependencies]` in pyproject.toml.

    >>> missing("Parquet and Arrow files", "parquet")
    "Parquet and Arrow files need the extra `parquet`: pip install -e '.[parquet]' in a checkout of shielded."
    """
    return f"{what} need the extra `{extra}`: pip install -e '.[{extra}]' in a checkout of shielded."
