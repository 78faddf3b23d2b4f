"""Train two agents to talk through their traces, keep them, load them again and ask.

The sender reads the evidence, the solver only the question: what the answer needs has to go across in latent steps.
"""

from peft import LoraConfig
from transformers import set_seed

from diffmas import Decoding, MultiAgentSystem, SystemTrainer, TrainArguments
from diffmas.embedded import EMBEDDED_PATH
from diffmas.tasks import TaskArguments, load_task

STEPS = 100


def main(steps: int = STEPS, folder: str = "runs/ask") -> None:
    set_seed(0)
    task = load_task(TaskArguments(task="relay:slots=4", eval_size=64))
    system = MultiAgentSystem(
        EMBEDDED_PATH,  # or the name of any decoder on the hub
        "relay",
        prompts=task.prompts,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        latent_steps=4,
        decoding=Decoding(max_new_tokens=4, temperature=0),
    )
    args = TrainArguments(
        output_dir=folder, max_steps=steps, learning_rate=3e-3, per_device_train_batch_size=128, logging_steps=20
    )
    trainer = SystemTrainer(system, args, train_dataset=task.train, eval_dataset=[task.eval[i] for i in range(64)])
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()

    system = MultiAgentSystem.from_pretrained(folder)
    item = {"evidence": "A3 B14 C4 D6", "question": "Recall B"}
    print(item, "->", system.answer([item])[0])


if __name__ == "__main__":
    main()
