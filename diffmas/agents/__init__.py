"""Who talks to whom: topologies, the trajectory, latent rollouts, alignment, controls, and what a row costs."""
