"""Write the page of recipe keys from the settings classes themselves, as `rsaft-fast train --help-config` does.

python .ci/recipe_keys.py
"""

from pathlib import Path

from rsaft_fast.recipe.config import Config
from rsaft_fast.recipe.schema import help_text

PAGE = Path(__file__).parents[1] / "docs" / "recipe-keys.md"
INTRODUCTION = """\
# Every key of a recipe

Each key with its default and what it does, costs and saves. `rsaft-fast train --help-config KEY` prints the same on a
terminal. Below a line `# or`, the keys are those of another choice of the section's `name`.
"""

if __name__ == "__main__":
    sections = [f"## {name}\n\n```yaml\n{help_text(Config, 96, name)}\n```\n" for name in Config.model_fields]
    PAGE.write_text("\n".join([INTRODUCTION, *sections]), encoding="utf-8")
