import pytest

from spark3r_ros.config import Config, ReductionConfig, WindowConfig, parameters, with_values


def test_every_default_is_valid_and_documented():
    names = [p.name for p in parameters(Config())]
    assert len(names) == len(set(names))
    assert all(p.doc for p in parameters(Config()))


def test_values_are_applied_by_dotted_name():
    config = with_values(Config(), {"window.size": 12, "context.budget_mb": 64})
    assert config.window.size == 12
    assert config.context.budget_mb == 64.0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("window.size", 1, "window.size must be >= 2, got 1"),
        ("window.size", "8", "window.size must be of type int, got '8'"),
        ("window.size", True, "window.size must be of type int"),
        ("reduction.matching", "v", "reduction.matching must be one of 'input', 'q', 'k', got 'v'"),
        ("alignment.scale_prior_sigma", float("nan"), "must be finite"),
        ("window.siez", 8, "unknown parameter 'window.siez'; did you mean window.size"),
    ],
)
def test_bad_values_are_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        with_values(Config(), {name: value})


def test_overlap_must_be_smaller_than_the_window():
    with pytest.raises(ValueError, match="window.overlap must be < window.size"):
        WindowConfig(size=4, overlap=4)


def test_group_of_one_is_refused():
    with pytest.raises(ValueError, match="reduction.group_size must be >= 2, got 1"):
        ReductionConfig(group_size=1)
