"""The one error of this pack: what is wrong, where, what was expected and what to do about it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["LowBitError"]


class LowBitError(ValueError):
    """A checkpoint, setting or device that cannot be used, told so that the user can act.

    Args:
        what: One sentence: what went wrong.
        file: The file or folder it was found in.
        layer: The module or tensor name as the file spells it.
        found: What stands there.
        expected: What should stand there.
        remedy: What the user can do.

    Each part is kept as an attribute, so that a report can show them apart.
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | Path | None = None,
        layer: str | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.file = None if file is None else str(file)
        self.layer = layer
        self.found = None if found is None else str(found)
        self.expected = None if expected is None else str(expected)
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        for label, value in (
            ("file", self.file),
            ("layer", self.layer),
            ("found", self.found),
            ("expected", self.expected),
            ("what to do", self.remedy),
        ):
            if value is not None:
                parts.append(f"  {label}: {value}")
        return "\n".join(parts)

    def located(self, *, file: str | Path | None = None, layer: str | None = None) -> LowBitError:
        """The same error with a file or layer filled in where the raiser did not know it."""
        return LowBitError(
            self.what,
            file=self.file if self.file is not None else file,
            layer=self.layer if self.layer is not None else layer,
            found=self.found,
            expected=self.expected,
            remedy=self.remedy,
        )
