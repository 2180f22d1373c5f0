"""Write-only outsides: formats that merged weights are exported to."""
