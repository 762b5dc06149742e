"""Write the golden files anew after a wanted change: PYTHONPATH=. python tests/unit/planning/rewrite_golden.py."""

import json
from pathlib import Path

from launcher.planning.deepspeed_config import deepspeed_config
from tests.unit.planning.examples import SIX, plan_of

for name, recipe in SIX.items():
    config = deepspeed_config(plan_of(recipe).chosen.candidate)
    target = Path(__file__).parent / "golden" / f"deepspeed-{name}.json"
    target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(target)
