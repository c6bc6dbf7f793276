"""Extension of griffe: the options of the configuration are described by their help texts."""

import ast
import html

from griffe import ExprCall, Extension


class Options(Extension):
    """Read `name: type = option(default, help, ...)`, which has default and text in a call."""

    def on_class_members(self, *, cls, **kwargs):
        """Add the help texts to the docstring of a group of options."""
        lines = []
        for attribute in cls.attributes.values():
            call = attribute.value
            if isinstance(call, ExprCall) and str(call.function) == "option":
                attribute.value, text = call.arguments[:2]
                text = html.escape(ast.literal_eval(str(text)), quote=False)
                lines.append(f"    {attribute.name}: {text}")
        if lines:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)
