"""What the programs here say when a package is not installed."""

import contextlib
import pathlib
import sys


@contextlib.contextmanager
def extra(name, module):
    """Imports; a program that lacks a package ends with the command that installs it.

    Args:
      name: The extra of this package that holds what is imported.
      module: ``__name__`` of the program. If that is imported itself, it raises as ever.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if module != "__main__":
            raise
        program = pathlib.Path(sys.argv[0]).name
        package = str(error.name or error).partition(".")[0]
        print(
            f"{program}: needs {package}: pip install 'raclora-jax[{name}]'",
            file=sys.stderr,
        )
        sys.exit(2)
