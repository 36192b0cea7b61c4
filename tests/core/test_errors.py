from tfslurm import errors
from tfslurm.errors import TfslurmError


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes():
    classes = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, TfslurmError)}
    for kind in classes:
        assert kind.__name__ in errors.__doc__
        if "exit_code" in vars(kind):
            assert f"{kind.__name__} ({kind.exit_code})" in errors.__doc__


def test_an_error_shows_its_hint_on_a_line_of_its_own():
    assert str(TfslurmError("broken")) == "broken"
    assert str(TfslurmError("broken", hint="Mend it.")) == "broken\nMend it."
