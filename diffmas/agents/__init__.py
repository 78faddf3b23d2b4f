"""Who talks to whom, and how: topologies, the trajectory, latent rollouts, alignment, controls, and what a row costs."""
