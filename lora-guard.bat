@echo off
rem LoRA Guard's commands with the WebUI's own Python, from the extension's folder: .\lora-guard plan MODEL LORA:0.8
setlocal
set "WEBUI_PYTHON="
for %%P in ("%~dp0..\..\venv\Scripts\python.exe" "%~dp0..\..\..\system\python\python.exe") do if not defined WEBUI_PYTHON if exist %%P set "WEBUI_PYTHON=%%~fP"
if not defined WEBUI_PYTHON set "WEBUI_PYTHON=python"
set "PYTHONPATH=%~dp0;%PYTHONPATH%"
"%WEBUI_PYTHON%" -m lib_lora_guard %*
