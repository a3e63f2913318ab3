"""The names that cross a part's border are the documented ones."""

from sere_ext.contract.profile import Evidence
from sere_ext.contract.record import outside_name


def test_a_digit_inside_a_word_does_not_start_a_new_word() -> None:
    assert outside_name("e2el_ms") == "e2elMs"
    assert outside_name("tensor_parallel_size") == "tensorParallelSize"
    assert Evidence.model_fields["e2el_ms"].alias == "e2elMs"
