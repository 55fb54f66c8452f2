"""What knows an outside library, one file each; nothing below imports these."""
