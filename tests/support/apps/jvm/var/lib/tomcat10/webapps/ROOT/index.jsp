<%@ page contentType="text/html; charset=UTF-8" import="java.util.stream.*" %><!doctype html>
<title>Shop @RELEASE@</title>
<ul>
<% for (int n : IntStream.rangeClosed(1, 50).filter(n -> n % 7 == 0).toArray()) { %><li>article <%= n %></li>
<% } %></ul>
