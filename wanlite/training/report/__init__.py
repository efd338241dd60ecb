"""The files of a run -> report.html, a page that shows them."""
