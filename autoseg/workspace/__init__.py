"""Every path under a work_dir, and every state that is stored there."""
