"""What people look at: the HTML report and contact sheets."""
