"""SpecForge's own numbers, on plain CPU torch and through torch_xla."""

import pytest
from golden_case import FILES, GoldenCase


def test_there_are_golden_files():
    assert len(FILES) == 6


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_plain_torch(file):
    case = GoldenCase(file)
    case.check(case.run())


@pytest.mark.xdist_group("golden")  # in one process each graph that two of them share is compiled once
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_through_xla(file):
    import torch_xla

    case = GoldenCase(file).to(torch_xla.device())
    result = case.run()
    torch_xla.sync()
    case.check(result)


@pytest.mark.parametrize("change", ["rows", "mean_over", "decay", "objective"])
def test_the_check_notices(change):
    case = GoldenCase(FILES[1])
    setattr(case.loss, change, {"rows": "serving", "mean_over": "rows", "decay": 0.9, "objective": "lk_alpha"}[change])
    with pytest.raises(AssertionError):
        case.check(case.run())
