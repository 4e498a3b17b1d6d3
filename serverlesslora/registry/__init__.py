"""What is deployed, kept through any end of the server: functions, their numbered versions, and who gets which."""
