"""Who talks to whom, and how: topologies, the trajectory, latent rollouts, controls, and what a row costs."""
