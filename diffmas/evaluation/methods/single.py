"""One agent answers alone, thinking or not where its model can do both.

With supervised fine-tuning, it is trained on the same items and steps as every trained method.
"""

from diffmas.agents.topology import alone
from diffmas.evaluation.methods.base import Method

SINGLE = Method("single", "one agent", topology=alone)
SINGLE_THINKING = Method("single+thinking", "one agent, thinking", topology=alone, thinking=True)
SINGLE_NO_THINKING = Method("single+no_thinking", "one agent, not thinking", topology=alone, thinking=False)
SINGLE_SFT = Method("single+sft", "one agent, fine-tuned", trained=True, topology=alone)
