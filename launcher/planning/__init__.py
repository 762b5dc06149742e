"""What was decided: candidates, estimates, the plan and the DeepSpeed configuration."""
