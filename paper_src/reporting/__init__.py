"""What makes a paper of the sections: tables, figures, claims, summary, page, and the runs of notebooks."""
