"""data/params.yaml: the settings of the stages that build the project's tables."""

from pathlib import Path

from pydantic import Field, ValidationError

from mka.errors import CalibrationError
from mka.outside.reading import explain_first, read_within
from mka.sections import LONGEST_YAML, Section, parse_yaml


class PackagePin(Section):
    """The package that carries the sets."""

    requirement: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class CalibrationCounts(Section):
    """Texts per source of the calibration table."""

    boolq: int = Field(ge=1)
    mmlu: int = Field(ge=1)
    min_chars: int = Field(ge=1)


class AlignmentCounts(Section):
    """Texts per source of the alignment table, and the lengths they are kept between."""

    boolq: int = Field(ge=1)
    cnn: int = Field(ge=1)
    gsm8k: int = Field(ge=1)
    gutenberg: int = Field(ge=1)
    mbpp: int = Field(ge=1)
    medqa: int = Field(ge=1)
    mmlu: int = Field(ge=1)
    pubmedqa: int = Field(ge=1)
    qasper: int = Field(ge=1)
    min_chars: int = Field(ge=1)
    max_chars: int = Field(ge=1)


class HeldoutCounts(Section):
    """Texts per source of the held-out table."""

    boolq: int = Field(ge=1)
    sciq: int = Field(ge=1)
    min_chars: int = Field(ge=1)


class HeldoutDropCounts(Section):
    """Texts of the second held-out table."""

    drop: int = Field(ge=1)
    min_chars: int = Field(ge=1)


class EvaluationCounts(Section):
    """Items per task; MMLU counts are per subject."""

    items: int = Field(ge=1)
    mmlu_test: int = Field(ge=1)
    mmlu_dev: int = Field(ge=1)


class Params(Section):
    """data/params.yaml."""

    seed: int
    package: PackagePin
    calibration: CalibrationCounts
    alignment: AlignmentCounts
    heldout: HeldoutCounts
    heldout_drop: HeldoutDropCounts
    evaluation: EvaluationCounts


def load_params(path: Path) -> Params:
    """Read data/params.yaml.

    Raises:
        CalibrationError: naming the key that is missing, unknown or impossible.
    """
    try:
        return Params.model_validate(parse_yaml(read_within(path, LONGEST_YAML).decode("utf-8")))
    except ValidationError as error:
        raise CalibrationError(f"{path}: {explain_first(error)}") from None
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from None
