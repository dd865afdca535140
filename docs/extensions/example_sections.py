"""Griffe knows a docstring's `Examples:`; ours say `Example:`, and are to be shown as code all the same."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Reads `Example:` as `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section in a docstring that was read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
