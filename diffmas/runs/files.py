"""Names of the files in a run's folder."""

#: What a run was made from, as the run itself keeps it.
PROMPTS_FILE, TOPOLOGY_FILE = "prompts.yaml", "topology.yaml"
SYSTEM_FILE, ALIGNMENT_FILE, ADAPTER_FILE = "system.json", "alignment.safetensors", "adapter_model.safetensors"
#: What is written on the way, and what is left for people.
METRICS_FILE, PROFILE_FILE = "metrics.jsonl", "profile.json"
SUMMARY_FILE, RECORDS_FILE, REPORT_FILE = "summary.json", "eval.jsonl", "report.html"
