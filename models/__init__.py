"""Models that come with the project: trained or built here, nothing is downloaded."""
