"""A team of one's own: who sees which field, who receives from whom, all in one YAML file; items from JSONL.

Two readers hold a price list each, the buyer is asked for the sum of two prices. No reader can know which prices are
wanted, and the buyer sees neither list.
"""

import json
import random
from pathlib import Path

from peft import LoraConfig
from transformers import set_seed

from diffmas import Decoding, MultiAgentSystem, SystemTrainer, TrainArguments
from diffmas.embedded import EMBEDDED_PATH

TEAM = """
name: shop
handover: latent
agents:
  - {name: fruit, prompt: "fruit: {fruit}", fields: [fruit]}
  - {name: tools, prompt: "tools: {tools}", fields: [tools]}
  - {name: buyer, prompt: "sum of {wanted}?", fields: [wanted], receives: [fruit, tools]}
"""


def items(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        a, b = draw.randrange(5), draw.randrange(5)
        made.append({"fruit": f"apple {a}", "tools": f"saw {b}", "wanted": "apple and saw", "answer": str(a + b)})
    return made


def main(steps: int = 30, folder: str = "runs/shop") -> None:
    set_seed(0)
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    (home / "team.yaml").write_text(TEAM)
    (home / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items(512, seed=0)))

    system = MultiAgentSystem(
        EMBEDDED_PATH,
        str(home / "team.yaml"),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        latent_steps=2,
        decoding=Decoding(max_new_tokens=4, temperature=0),
    )
    data = [json.loads(line) for line in (home / "items.jsonl").open()]
    args = TrainArguments(
        output_dir=folder, max_steps=steps, learning_rate=3e-3, per_device_train_batch_size=32, logging_steps=10
    )
    trainer = SystemTrainer(system, args, train_dataset=data, eval_dataset=items(32, seed=1))
    trainer.train()
    print(trainer.evaluate())
    print("apple 2, saw 2:", system.answer([{"fruit": "apple 2", "tools": "saw 2", "wanted": "apple and saw"}])[0])


if __name__ == "__main__":
    main()
