"""Who talks to whom, and how: topologies, the trajectory, latent runs, alignment, controls, and what a row costs."""
