"""What a run tells: its log, and its page, which ``python -m trainer.report RUN`` writes again."""

from .log import Report, log_environment, log_network, log_scores, open_log
from .page import write_page

__all__ = ["Report", "log_environment", "log_network", "log_scores", "open_log", "write_page"]
