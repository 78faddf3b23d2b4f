"""One agent answers alone; with supervised fine-tuning, on the same items and steps as every trained method."""

from diffmas.methods.base import Method
from diffmas.topology import alone

SINGLE = Method("single", "one agent", topology=alone)
SINGLE_SFT = Method("single+sft", "one agent, fine-tuned", trained=True, topology=alone)
