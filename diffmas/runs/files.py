"""Names of the files in a run's folder."""

#: What a run was made from, as the run itself keeps it.
PROMPTS_FILE, TOPOLOGY_FILE = "prompts.yaml", "topology.yaml"
SYSTEM_FILE, ALIGNMENT_FILE, ADAPTER_FILE = "system.json", "alignment.safetensors", "adapter_model.safetensors"
