"""One agent answers alone; with supervised fine-tuning, on the same items and steps as every trained method."""

from diffmas.agents.topology import alone
from diffmas.evaluation.methods.base import Method

SINGLE = Method("single", "one agent", topology=alone)
SINGLE_SFT = Method("single+sft", "one agent, fine-tuned", trained=True, topology=alone)
