"""Deep Potential: data, model, training, and exchange with DeePMD-kit and ASE."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlekf_ext.potential.calculator import Calculator as Calculator


def __getattr__(name: str) -> Any:
    if name == "Calculator":  # not above: it needs ase, an optional package
        try:
            from rlekf_ext.potential.calculator import Calculator
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"Calculator needs {error.name}: run `pip install 'rlekf_ext[potential,ase]'`.", name=error.name
            ) from error
        return Calculator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
