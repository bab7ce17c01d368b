import requests
import yaml
from django.conf import settings
from django.contrib import admin
from django.contrib.auth.models import Permission
from django.shortcuts import render
from django.urls import path


def home(request):
    permissions = Permission.objects.order_by("codename").values_list("codename", flat=True)
    versions = {"requests": requests.__version__, "yaml": yaml.__version__}
    context = {"permissions": permissions, "versions": versions, "release": settings.RELEASE}
    return render(request, "home.html", context)


urlpatterns = [path("admin/", admin.site.urls), path("", home)]
