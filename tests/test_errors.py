"""Errors under the names of the version before."""

import pytest

from tinyllama_ds import errors


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Refusal", errors.ConfigError),
        ("BadData", errors.DataError),
        ("BadNumbers", errors.NumericsError),
        ("EXIT_REFUSED", errors.EXIT_CONFIG),
    ],
)
def test_an_old_name_is_an_alias_with_a_warning(old: str, new: object) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now"):
        assert getattr(errors, old) is new


def test_a_name_that_never_was_is_an_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        errors.Nonsense  # noqa: B018
