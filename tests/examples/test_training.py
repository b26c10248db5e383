"""The examples that train do: a reward of one's own rises, and a recipe leaves its records and files."""

import pytest

from examples.reference import example


@pytest.mark.slow
def test_a_reward_of_ones_own_rises(tmp_path):
    before, after = example("own_reward").main(output_dir=str(tmp_path / "run"))
    assert after > before + 0.01


def test_a_recipe_trains_from_python(tmp_path):
    records = example("train_from_python").main(output_dir=str(tmp_path / "run"))
    assert [record["step"] for record in records] == [1, 2]
    assert (tmp_path / "run" / "lora" / "kohya_lora_weights.safetensors").is_file()
